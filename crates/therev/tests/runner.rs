//! All integration tests of the library, on real servers; each has a cluster of its own and ends with `check`.

#[path = "runner/agreement.rs"]
mod agreement;
#[path = "runner/apart.rs"]
mod apart;
#[path = "runner/attacks.rs"]
mod attacks;
#[path = "runner/authors.rs"]
mod authors;
#[path = "runner/examples.rs"]
mod examples;
#[path = "runner/fence.rs"]
mod fence;
#[path = "runner/generated.rs"]
mod generated;
#[path = "runner/imported.rs"]
mod imported;
#[path = "runner/journey.rs"]
mod journey;
#[path = "runner/lanes.rs"]
mod lanes;
#[path = "runner/lives.rs"]
mod lives;
#[path = "runner/matrix.rs"]
mod matrix;
#[path = "runner/moves.rs"]
mod moves;
#[path = "runner/moves_and_promotions.rs"]
mod moves_and_promotions;
#[path = "runner/names.rs"]
mod names;
#[path = "runner/outages.rs"]
mod outages;
#[path = "runner/outbox.rs"]
mod outbox;
#[path = "runner/pairs.rs"]
mod pairs;
#[path = "runner/personal.rs"]
mod personal;
#[path = "runner/pins.rs"]
mod pins;
#[path = "runner/posts.rs"]
mod posts;
#[path = "runner/promotion.rs"]
mod promotion;
#[path = "runner/refusals.rs"]
mod refusals;
#[path = "runner/repair.rs"]
mod repair;
#[path = "runner/roles.rs"]
mod roles;
#[path = "runner/routing.rs"]
mod routing;
#[path = "runner/sessions.rs"]
mod sessions;
#[path = "runner/shards_come_and_go.rs"]
mod shards_come_and_go;
#[path = "runner/statements.rs"]
mod statements;
#[path = "runner/strangers.rs"]
mod strangers;
#[path = "runner/tasks.rs"]
mod tasks;
#[path = "runner/things.rs"]
mod things;
#[path = "runner/together.rs"]
mod together;
