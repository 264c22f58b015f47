//! The operator's requests, as JSON over HTTP on a unix socket: [`types`] are its shapes, [`routes`] its answers.
//! No policy of its own: it asks the catalogue, the runbook and the verifier. Served by `daemon`, used by `lifeboat`.

mod journal;
pub mod routes;
pub mod types;
