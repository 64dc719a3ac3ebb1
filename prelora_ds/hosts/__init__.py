"""Many hosts: who the ranks are, whether they are fit, and who watches over them."""
