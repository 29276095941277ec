//go:build tools

// Package tools pins crictl and critest; `cargo xtask setup` builds them from this module.
// A module of ours is needed because cri-tools cannot be installed by version: its go.mod has replace lines.
package tools

import (
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	_ "sigs.k8s.io/cri-tools/cmd/critest"
)
