//! CernVM-FS for the kernel: FUSE adapter, supervisor and the cvmfs-client binary.
