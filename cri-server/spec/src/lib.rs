//! OCI specs from CRI requests.
