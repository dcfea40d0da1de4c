//! All tests of relocation: models of the copy and of the switch, every interleaving of them.

#[path = "runner/copy_model.rs"]
mod copy_model;
#[path = "runner/model.rs"]
mod model;
