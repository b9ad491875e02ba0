"""IP addresses that a request to a URL of a third party must not reach, and one that it may."""

PRIVATE = (
    "127.0.0.1 127.9.9.9 10.1.2.3 172.16.0.9 192.168.1.1 169.254.169.254 0.0.0.0 0.1.2.3 100.64.0.1 100.127.255.255 "
    "192.0.0.8 192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255"
)
# An IPv4 address inside an IPv6 address, which a translator or tunnel may deliver to it; also a public one.
MAPPED = (
    "::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:93.184.215.14 ::ffff:0:10.0.0.1 ::10.0.0.1 ::93.184.215.14 "
    "64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::93.184.215.14 64:ff9b:1::a00:1 64:ff9b:1:fffe::93.184.215.14 "
    "2002:a00:1:: 2002:7f00:1::1 2002:5db8:d70e:: 2001:0:5ef5:79fb::1 2001:0:4136:e378:8000:63bf:f5ff:fffe "
    "2001:db8::1 2001:10::1 fec0::1 ff0e::1 100::1 5f00::1 fe80::1%1"
)
PUBLIC = "93.184.215.14"
