//! Enrolment: how an agent gets its first certificate, with a one-time token that an operator carries over.
//! Promises: the agent talks only to the site whose authority the token names; its key never leaves its host; a token
//! buys one certificate, even when the site loses power in between. See docs/wire-protocol.md.

mod agent;
mod exchange;
mod site;
mod token;
mod tokens;

pub use agent::enrol;
pub use site::{Enrolled, serve};
pub use token::{EnrolmentToken, TokenError};
pub use tokens::{EnrolmentTokens, Issued, TokenRefusal, TokenStatus};

#[cfg(test)]
mod tests;
