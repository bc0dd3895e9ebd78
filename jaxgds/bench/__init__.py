"""`jaxgds bench`: measurements that users can repeat, each against its physical limit and peers."""
