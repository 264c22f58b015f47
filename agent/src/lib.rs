//! Lifeboat's daemon on a source host, as a library, so that the bench can run it in process.

pub mod capture;
pub mod watchdog;
