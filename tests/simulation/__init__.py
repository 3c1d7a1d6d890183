"""Device, gateway and broker in one process, on a virtual clock and a virtual network whose faults come from a seed."""
