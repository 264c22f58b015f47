//! What Lifeboat asks of KVM, through libvirt and QEMU's monitor.
//! [`monitor`] is the narrow door that everything else uses; [`libvirt`] is the one home of the `virt` crate.

pub mod monitor;
