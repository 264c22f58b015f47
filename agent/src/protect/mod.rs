//! Protecting VMs: one actor per VM ([`vm`]) that cuts points when they are due and sees each through to the site's
//! acknowledgement; [`resync`] makes that cheap where the source has forgotten what the site holds; [`link`] is what it
//! needs of a link; [`status`] is where it says how it is doing, and [`pace`] and [`gauge`] why no better.

pub mod assignments;
pub mod gauge;
pub mod generations;
pub mod holds;
pub mod link;
pub mod lookout;
pub mod neighbour;
pub mod pace;
pub mod resync;
mod saves;
pub mod status;
pub mod touched;
pub mod vm;
