//! All tests of relocation: the model of the switch, every interleaving of it.

#[path = "runner/model.rs"]
mod model;
