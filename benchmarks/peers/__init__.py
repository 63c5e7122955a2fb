"""The peers, each called as its documentation recommends."""
