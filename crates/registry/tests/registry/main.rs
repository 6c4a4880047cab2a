//! The client against real and misbehaving registries.
#![allow(clippy::unwrap_used, reason = "helpers of tests may end the test")]

mod docker_registry;
mod faults;
mod mirrors;
mod script;
mod tokens;
