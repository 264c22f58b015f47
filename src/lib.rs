//! Lifeboat's shared library: what the agent and the site controller must agree on.
//!
//! Read in this order; imports only ever point upwards in this list:
//! 1. vocabulary, no I/O: [`id`], [`units`], [`address`], [`clock`], [`page`], [`error`]
//! 2. data and their bytes: [`chunk`], [`extent`], [`format`], [`wire`], [`qemu`]
//! 3. behaviour without sockets or clocks: [`session`]
//! 4. edges, each foreign crate in one room: [`durable`] and [`volatile`] (small files), [`boot`] (the host's),
//!    [`transport`] (quinn, rustls, rcgen), [`hypervisor`] (virt),
//!    [`nbd`] (a client of QEMU's disk servers), [`local_api`] (axum, hyper over a unix socket),
//!    [`config`] (toml), [`telemetry`] (tracing), [`calendar`] (jiff's time zones), [`fault`]
//! 5. a third party, over those edges: [`witness`]

pub mod address;
pub mod boot;
pub mod calendar;
pub mod chunk;
pub mod clock;
pub mod config;
pub mod durable;
pub mod error;
pub mod extent;
pub mod fault;
pub mod format;
pub mod hypervisor;
pub mod id;
pub mod local_api;
pub mod nbd;
pub mod page;
pub mod qemu;
pub mod session;
pub mod telemetry;
pub mod transport;
pub mod units;
pub mod volatile;
pub mod wire;
pub mod witness;
