//! Placeholder of catamaran-cgroups.
