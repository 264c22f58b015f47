//! The site daemon.
fn main() {}
