//! The operator's requests, as JSON over HTTP: [`types`] are their shapes, [`routes`] the table of them, one file for each
//! family the answers. No policy of its own: it asks the catalogue, the runbook and the verifier. Served by `daemon`, used
//! by `lifeboat`.

mod failovers;
mod group_failovers;
mod groups;
mod handovers;
mod points;
mod readiness;
pub mod role;
pub mod routes;
mod seeds;
pub mod site;
mod status;
pub mod types;
mod verify;
