//! What `lifeboat` shows: [`tables`] for people, and a file for each family of commands, made of [`text`]; [`watch`] for work
//! that takes time. JSON is the API's own shapes.

pub mod audit;
pub mod drills;
pub mod groups;
pub mod handovers;
pub mod readiness;
pub mod replicas;
pub mod report;
pub mod seeds;
pub mod tables;
pub mod text;
pub mod tokens;
pub mod watch;
