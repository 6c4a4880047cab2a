//! The format against its ground truth: repositories made by the C++ tools, an independent reader, hostile input.

// The configured exception for tests covers functions marked #[test] only.
#![allow(clippy::unwrap_used)]

mod common;
mod ground_truth;
mod hostile;
mod oracle;
mod properties;
mod refusals;
mod tags;
mod writing;
