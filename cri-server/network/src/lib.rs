//! Placeholder of catamaran-network.
