//! Boots QEMU guests (emulated, no hardware virtualization needed) with the agent as pid 1 and drives it over
//! the virtio-serial port, as the vm shim does.
//!
//! Needs a guest kernel (`CATAMARAN_TEST_KERNEL`; deploy/guest/build-kernel makes one with everything built in,
//! for any other `CATAMARAN_TEST_INITRAMFS` names the initramfs with its modules), QEMU, busybox and the static
//! agent (`CATAMARAN_TEST_AGENT`); what is missing is named and the test skipped.

mod containers;
mod initramfs;
mod vm;
