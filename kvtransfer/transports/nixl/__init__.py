"""NIXL, the library of RDMA clusters."""
