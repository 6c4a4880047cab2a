//! What users of the publisher see: repositories made, filled, checked, served; bad input; crashes.

// a test fails by panicking, also in its supporting code
#![allow(clippy::unwrap_used)]

mod bad_input;
mod check;
mod collect;
mod crash;
mod diff;
mod layers;
mod model;
mod revisions;
mod round_trip;
mod support;
mod takeover;
mod tar;
