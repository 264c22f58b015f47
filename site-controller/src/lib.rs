//! The site controller.
