//! End-to-end stories; see the `tests/` folder of this package.
