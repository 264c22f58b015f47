//! Protecting VMs: one actor per VM ([`vm`]) that cuts points when they are due and sees each through to the site's
//! acknowledgement; [`link`] is what it needs of a link; [`status`] is where it says how it is doing.

pub mod generations;
pub mod link;
pub mod lookout;
pub mod neighbour;
pub mod status;
pub mod touched;
pub mod vm;
