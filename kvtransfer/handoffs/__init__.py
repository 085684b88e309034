"""The protocol of a handoff: grants on the receiver, deliveries on the sender, leases."""
