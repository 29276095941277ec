// The Go client of Kubernetes (client-go), driven by the tests of the streaming server:
//
//	go_client exec spdy|websocket URL [tty] [stdin] [stdout] [stderr] [size=WxH]...
//	go_client forward spdy|websocket URL PORT
//
// exec copies its own standard streams; it exits with the command's exit code, or 125 and the error's text.
// forward listens on a free local port, prints "ready LOCALPORT" and forwards until its stdin ends.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		var exit exec.CodeExitError
		if errors.As(err, &exit) {
			os.Exit(exit.Code)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(125)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return errors.New("usage: go_client exec|forward spdy|websocket URL ...")
	}
	target, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	config := &rest.Config{Host: target.Host, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	if target.Scheme == "http" {
		config.TLSClientConfig = rest.TLSClientConfig{}
	}
	switch args[0] {
	case "exec":
		return stream(config, args[1], target, args[3:])
	case "forward":
		return forward(config, args[1], target, args[3:])
	}
	return fmt.Errorf("unknown verb %q", args[0])
}

type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	if size, ok := <-s; ok {
		return &size
	}
	return nil
}

func stream(config *rest.Config, transport string, target *url.URL, flags []string) error {
	options := remotecommand.StreamOptions{}
	queue := make(sizes, 1000)
	for _, flag := range flags {
		switch {
		case flag == "tty":
			options.Tty = true
			options.TerminalSizeQueue = queue
		case flag == "stdin":
			options.Stdin = os.Stdin
		case flag == "stdout":
			options.Stdout = os.Stdout
		case flag == "stderr":
			options.Stderr = os.Stderr
		case strings.HasPrefix(flag, "size="):
			var size remotecommand.TerminalSize
			if _, err := fmt.Sscanf(flag, "size=%dx%d", &size.Width, &size.Height); err != nil {
				return err
			}
			queue <- size
		default:
			return fmt.Errorf("unknown flag %q", flag)
		}
	}
	var executor remotecommand.Executor
	var err error
	if transport == "spdy" {
		executor, err = remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
	} else {
		executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, target.String())
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return executor.StreamWithContext(ctx, options)
}

func forward(config *rest.Config, transport string, target *url.URL, args []string) error {
	stop, ready := make(chan struct{}), make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	ports := []string{"0:" + args[0]}
	var forwarder *portforward.PortForwarder
	var err error
	if transport == "spdy" {
		roundTripper, upgrader, tripErr := spdy.RoundTripperFor(config)
		if tripErr != nil {
			return tripErr
		}
		dialer := spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, target)
		forwarder, err = portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, ports, stop, ready, io.Discard, os.Stderr)
	} else {
		dialer, dialErr := portforward.NewSPDYOverWebsocketDialer(target, config)
		if dialErr != nil {
			return dialErr
		}
		forwarder, err = portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, ports, stop, ready, io.Discard, os.Stderr)
	}
	if err != nil {
		return err
	}
	go func() {
		<-ready
		if bound, err := forwarder.GetPorts(); err == nil {
			fmt.Printf("ready %d\n", bound[0].Local)
		}
	}()
	return forwarder.ForwardPorts()
}
