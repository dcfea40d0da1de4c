//! Real servers, template databases and workloads for tests.
