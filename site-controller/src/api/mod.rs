//! The operator's requests, as JSON over HTTP: [`types`] are their shapes, [`routes`] the table of them, one file for each
//! family the answers. Each request passes the [`gate`], which knows the callers ([`caller`]) by their tokens ([`token_book`])
//! and has an [`audit`] log of what they change. No policy of its own beyond that: it asks the catalogue, the runbook and the
//! verifier. Served by `daemon`, used by `lifeboat`.

pub mod audit;
mod audits;
mod automatic;
pub mod caller;
pub mod codes;
mod drills;
mod failovers;
pub mod gate;
mod group_failovers;
mod groups;
mod handovers;
pub mod openapi;
mod points;
mod readiness;
mod replicas;
mod reports;
pub mod role;
pub mod routes;
mod seeds;
pub mod site;
mod status;
pub mod token_book;
mod tokens;
pub mod types;
mod undos;
mod verify;
