//! Boots QEMU guests (emulated, no hardware virtualization needed) with the agent as pid 1 and drives it over
//! the virtio-serial port, as the vm shim does.
//!
//! Needs a guest kernel with everything built in (`CATAMARAN_TEST_KERNEL`, deploy/guest/build-kernel), QEMU,
//! busybox and the static agent (`CATAMARAN_TEST_AGENT`, README of deploy/guest); what is missing is named and
//! the test skipped.

mod containers;
mod initramfs;
mod vm;
