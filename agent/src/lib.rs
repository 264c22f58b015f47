//! Lifeboat's daemon on a source host, as a library, so that the bench can run it in process.
//!
//! [`protect`] decides when a point is due and sees it through; [`capture`] cuts it; [`ship`] carries it to the site;
//! [`watchdog`] makes sure that no guest stays paused because of us; [`witness`] keeps VMs under a third party's
//! eyes; [`fence`] keeps a copy from running that was failed over; [`daemon`] wires the rooms.

pub mod admin;
pub mod capture;
pub mod config;
pub mod daemon;
pub mod fence;
pub mod protect;
pub mod ship;
pub mod watchdog;
pub mod witness;
