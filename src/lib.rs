//! Lifeboat, shared library.
