//! The server as its clients see it, with a backend that answers by itself.
