"""The guard: the loss, the teacher, the rehearsal rows and the trainer that holds them together."""
