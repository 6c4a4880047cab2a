//! End-to-end stories; see the `tests/` folder of this package. Each file there is one story, told by test
//! functions whose names say what a user sees.
