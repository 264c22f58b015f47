//! Bytes as chunks: their identity ([`digest`]), their compressed form ([`codec`]), and the short digests by which copies
//! are compared ([`fingerprint`]).

pub mod codec;
pub mod digest;
pub mod fingerprint;
