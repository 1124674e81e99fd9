"""Which of a job's hosts this one is, for torchrun.sh: its number, how many there are, the first one, and the network
interface by which this one reaches the others.

    python launchers/this_host.py node1,node2
"""

import ipaddress
import socket
import sys

import psutil


def address_of(host: str) -> str:
    """The IPv4 address of a host."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"HOSTS: {host} is not known here ({error}): name hosts so that each host finds all") from None


def own_addresses() -> dict[str, str]:
    """This host's IPv4 addresses, and the interface of each."""
    return {
        address.address: interface
        for interface, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }


def own_address_towards(address: str) -> str:
    """Where answers from there would come to; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ValueError(f"HOSTS: no way from here to {address} ({error})") from None
        return str(probe.getsockname()[0])


def this_host(hosts: list[str]) -> tuple[int, str]:
    """Place of this host in the list, and its interface.

    raises  ValueError where it is not there, or more than once
    """
    addresses, own = [address_of(host) for host in hosts], own_addresses()
    mine = [i for i, found in enumerate(addresses) if found in own or ipaddress.ip_address(found).is_loopback]
    if len(mine) != 1:
        raise ValueError(
            f"HOSTS={','.join(hosts)} names {len(mine)} times a host with the addresses {', '.join(own)}: name every "
            "host of the job once, by a name or address that the others reach it by"
        )
    other = next((found for i, found in enumerate(addresses) if i != mine[0]), addresses[0])
    return mine[0], own[own_address_towards(other)]


if __name__ == "__main__":
    hosts = [host for host in sys.argv[1].split(",") if host]
    try:
        if not hosts:
            raise ValueError("HOSTS is not set: name every host of the job, HOSTS=node1,node2; one: accelerate.sh")
        number, interface = this_host(hosts)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(number, len(hosts), hosts[0], interface)
