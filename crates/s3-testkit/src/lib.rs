//! What tests with buckets stand on, apart from `testkit` because an S3 server is large: a real one on a directory,
//! with faults, and the product's layer service over it.

pub mod layer_service;
pub mod s3_server;

pub use layer_service::LayerService;
pub use s3_server::S3Server;
