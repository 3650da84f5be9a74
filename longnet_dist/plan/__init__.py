"""Which key a query sees; what a rank computes, sends and receives. Integers only, standard library only."""
