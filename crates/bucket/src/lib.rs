//! S3 stores for threads, and the bucket in which engines leave layers for the layer service (thin images §7).
//!
//! | module | what |
//! |---|---|
//! | [`network`] | the runtime of all connections, the HTTP client |
//! | [`connection`] | a bucket of a store: look, send, read, list |
//! | [`config`] | `config.json` of the plugin: where layers are left, and who publishes them |
//! | [`layers`] | the layers in a bucket |
//! | [`event`] | what a store tells of new ones |
//! | [`service`] | what the layer service says of a layer |

pub mod config;
pub mod connection;
pub mod event;
pub mod layers;
pub mod network;
pub mod service;

pub use config::{ConfigError, LayerServiceConfig};
pub use layers::{LayerBucket, LayerKey};
pub use service::{LayerState, ServiceClient};
