//! Bytes as chunks: their identity ([`digest`]) and their compressed form ([`codec`]).

pub mod codec;
pub mod digest;
