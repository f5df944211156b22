package httptool

import (
	"context"
	"net/netip"
)

// Resolver turns a host name into addresses. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP is asked for network "ip".
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}
