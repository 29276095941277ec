//go:build tools

// Package tools pins a runc that is newer than Debian's (idmapped mounts, user namespaces);
// `cargo xtask setup` builds it from this module.
package tools

import _ "github.com/opencontainers/runc"
