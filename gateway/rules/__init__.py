"""Who a device is and what it may do."""
