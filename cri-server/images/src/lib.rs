//! Placeholder of catamaran-images.
