"""The reference room: plain NumPy, one function per equation of docs/mathematics.md. What is true."""
