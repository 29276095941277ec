//! Placeholder of catamaran-streaming.
