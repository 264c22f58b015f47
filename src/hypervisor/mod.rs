//! What Lifeboat asks of KVM, through libvirt and QEMU's monitor.
//! [`monitor`] is the narrow door that everything else uses; [`libvirt`] is the one home of the `virt` crate;
//! [`domain_xml`] reads what a domain is made of and says what of it can't be protected; [`guest_agent`] is what is asked of
//! the agent within the guest; [`registers`] tells of a guest that will never go on; [`version`] is QEMU's.

pub mod domain_xml;
pub mod guest_agent;
pub mod libvirt;
pub mod monitor;
pub mod registers;
pub mod version;
