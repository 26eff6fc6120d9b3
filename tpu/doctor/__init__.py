"""`keras-effnet doctor`: checks versions, backends, devices, hosts, memory and disks."""
