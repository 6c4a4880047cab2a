//! What users of the publisher see: repositories made, filled, checked, served; bad input; crashes.

// a test fails by panicking, also in its supporting code
#![allow(clippy::unwrap_used)]

mod bad_input;
mod catalogs;
mod check;
mod collect;
mod crash;
mod diff;
mod inputs;
mod layers;
mod model;
mod replicate;
mod revisions;
mod round_trip;
mod s3;
mod support;
mod takeover;
mod tar;
